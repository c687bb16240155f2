// Draws every chart of the page with uPlot. Drag zooms, a double click shows everything, a click in the legend hides a curve.
"use strict";
(() => {
  const compact = Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 2});
  const short = value => value == null ? "–" : Math.abs(value) >= 1e4 ? compact.format(value).replace("K", "k") : String(Number(value.toPrecision(4)));
  const font = '12px system-ui, -apple-system, "Segoe UI", sans-serif';
  const TIMES = [[172800, 86400, "days"], [7200, 3600, "hours"], [120, 60, "minutes"], [0, 1, "seconds"]];
  const MANY = 20000;  // points that came while the page was open: it is loaded anew, and thinned
  const state = {axis: "tokens", smoothing: 0.6, scale: ""}, charts = [];
  const place = (one, axis) => axis === "tokens" ? one.x : one.others[axis];
  const every = ask => charts.some(({chart}) => chart.curves.some(ask));

  // TensorBoard's smoothing: an exponential moving average, divided by the share of the weights that there are so far.
  function smooth(values, weight) {
    let sum = 0, share = 0;
    return values.map(value => {
      sum = weight * sum + (1 - weight) * value;
      share = weight * share + (1 - weight);
      return sum / share;
    });
  }

  function timeUnit() {
    const ends = charts.flatMap(({chart}) => chart.curves.map(one => one.others.time?.at(-1) ?? 0));
    return TIMES.find(([from]) => Math.max(0, ...ends) >= from);
  }

  // What is drawn of a chart: a noisy curve as each step and smoothed.
  function drawn(chart, axis, log) {
    const result = [], per = axis === "time" ? timeUnit()[1] : 1;
    for (const [index, one] of chart.curves.entries()) {
      const put = (data, y, style, name = one.name) => {
        const x = place(data, axis);
        if (!x) return;
        const kept = [...x.keys()].filter(at => !log.includes("x") || x[at] > 0);
        result.push({
          index, style, name, color: one.color, x: kept.map(at => x[at] / per),
          y: kept.map(at => log.includes("y") && y[at] <= 0 ? null : y[at]), texts: one.texts && kept.map(at => one.texts[at]),
        });
      };
      if (one.style !== "noisy") put(one, one.y, one.style);
      else if (!state.smoothing) put(one, one.y, "line");
      else {
        const size = one.mean?.size;
        put(one, one.y, "faint", size ? `${one.name}, lowest and highest of ${2 * size}` : `${one.name}, each step`);
        put(one.mean ?? one, smooth((one.mean ?? one).y, state.smoothing), "line",
          size ? `${one.name}, means of ${size} smoothed` : `${one.name}, smoothed`);
      }
    }
    return result;
  }

  function options(card, width, axis, series, log) {
    const {chart, hidden} = card;
    const css = getComputedStyle(document.documentElement), color = name => css.getPropertyValue("--" + name);
    const grid = {
      stroke: color("muted"), font, labelFont: font, labelSize: 18, values: (plot, ticks) => ticks.map(tick => tick == null ? "" : short(tick)),
      grid: {stroke: color("grid"), width: 1}, ticks: {stroke: color("grid"), width: 1, size: 5},
    };
    const label = axis === "tokens" ? chart.x_label : axis === "time" ? `training time, ${timeUnit()[2]}` : "steps";
    // A few spikes must not flatten the rest. A zoom into a spike shows it.
    const clip = (low, high) => chart.clip_above !== null && low < chart.clip_above ? Math.min(high, chart.clip_above) : high;
    const range = (plot, low, high) => low === null ? [0, 1]
      : uPlot.rangeNum(chart.from_zero ? Math.min(0, low) : low, clip(low, high), 0.05, chart.from_zero);
    const logRange = (plot, low, high) => low === null ? [1, 10] : [low / 1.05, high * 1.05];
    const inside = (plot, at) => at >= plot.bbox.left && at <= plot.bbox.left + plot.bbox.width;
    const per = axis === "time" ? timeUnit()[1] : 1;
    const write = ctx => Object.assign(ctx, {font: `${11 * uPlot.pxRatio}px system-ui, sans-serif`, textAlign: "left", textBaseline: "middle"});
    // Text beside a place of the x axis: to its right, or to its left where the chart ends.
    const say = ({ctx, bbox}, text, across, gap, up) => {
      const wide = ctx.measureText(text).width + gap;
      ctx.fillText(text, across + wide > bbox.left + bbox.width ? across - wide : across + gap, up);
    };
    const markResumes = plot => {
      const {ctx, bbox} = plot, places = place(chart.resumes, axis) ?? [];
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = color("muted");
      write(ctx);
      ctx.setLineDash([2 * uPlot.pxRatio, 4 * uPlot.pxRatio]);
      for (const [index, at] of places.entries()) {
        const across = plot.valToPos(at / per, "x", true);
        if (!inside(plot, across)) continue;
        ctx.beginPath();
        ctx.moveTo(across, bbox.top);
        ctx.lineTo(across, bbox.top + bbox.height);
        ctx.stroke();
        if (places.length <= 6) say(plot, chart.resumes.texts[index], across, 4, bbox.top + bbox.height - 6);
      }
      ctx.restore();
    };
    // Steps that were not applied, by number; and triangles for what is above the chart.
    const markSpikes = plot => {
      const {ctx, bbox} = plot, size = 5 * uPlot.pxRatio;
      ctx.save();
      write(ctx);
      series.forEach((one, at) => {
        if (!plot.series[at + 1].show) return;
        ctx.fillStyle = color(one.color);
        one.x.forEach((x, index) => {
          const across = plot.valToPos(x, "x", true), y = one.y[index];
          if (y == null || !inside(plot, across)) return;
          const isAbove = y > plot.scales.y.max, up = isAbove ? bbox.top : plot.valToPos(y, "y", true);
          if (isAbove) {
            ctx.beginPath();
            ctx.moveTo(across, up);
            ctx.lineTo(across - size, up + 1.6 * size);
            ctx.lineTo(across + size, up + 1.6 * size);
            ctx.fill();
          }
          if (one.texts && one.x.length <= 20) say(plot, one.texts[index], across, 1.5 * size, isAbove ? up + size : up - 2 * size);
        });
      });
      ctx.restore();
    };
    const isMany = chart.curves.filter(one => one.style === "noisy").length > 1;
    const key = one => `${one.index}${one.style === "faint" && !isMany}`;
    const curve = one => {
      const texts = new Map(one.texts?.map((text, index) => [one.x[index], text]));
      const value = (plot, value, at, index) => one.texts ? texts.get(plot.data[0][index]) ?? "–" : short(value);
      const dots = one.style === "points" || one.style === "marks" || one.x.length === 1;
      return {
        label: one.name, stroke: color(one.color), value, show: !hidden.has(key(one)), width: one.style === "faint" ? 1 : 1.8,
        alpha: one.style === "faint" ? 0.35 : 1, dash: one.style === "dashed" ? [6, 4] : [],
        ...one.style === "marks" ? {paths: () => null} : {},
        points: dots ? {show: true, size: one.style === "marks" ? 8 : 6, fill: color("card")} : {show: false},
      };
    };
    const hideLegends = plot => series.forEach((one, at) => {
      if (isMany && one.style === "faint") plot.root.querySelectorAll(".u-series")[at + 1].style.display = "none";
    });
    const toggle = (plot, at, changed) => {
      if (!at || changed.show == null) return;
      const name = key(series[at - 1]);
      if (hidden.has(name) === !changed.show) return;
      hidden[changed.show ? "delete" : "add"](name);
      series.forEach((one, index) => key(one) === name && index !== at - 1 && plot.setSeries(index + 1, {show: changed.show}));
    };
    return {
      width, height: chart.height, series: [{label, value: (plot, value) => short(value)}, ...series.map(curve)],
      scales: {
        x: log.includes("x") ? {time: false, distr: 3, log: chart.logarithmic ? 2 : 10} : {time: false},
        y: log.includes("y") ? {distr: 3, log: 10, ...chart.logarithmic ? {} : {range: logRange}} : {range},
      },
      axes: [{...grid, label, size: 34}, {...grid, size: 54}],
      cursor: {sync: {key: label, setSeries: false}},
      hooks: {drawClear: [markResumes], draw: [markSpikes], ready: [hideLegends], setSeries: [toggle]},
    };
  }

  function draw(card) {
    const {chart, plot, element} = card, width = Math.max(120, element.clientWidth - 24);
    const axis = chart.curves.some(one => state.axis in one.others) ? state.axis : "tokens";
    const log = chart.logarithmic || state.scale, series = drawn(chart, axis, log);
    const view = `${axis} ${log.includes("x")} ${timeUnit()[2]}`, isZoomed = plot && card.view === view && plot.data[0].length
      && (plot.scales.x.min > plot.data[0][0] || plot.scales.x.max < plot.data[0].at(-1)), {min, max} = plot?.scales.x ?? {};
    plot?.destroy();
    card.view = view;
    card.plot = element.plot = new uPlot(options(card, width, axis, series, log), uPlot.join(series.map(one => [one.x, one.y])), element);
    if (isZoomed) card.plot.setScale("x", {min, max});
  }

  for (const element of document.querySelectorAll(".chart")) {
    const chart = JSON.parse(element.querySelector("script").textContent);
    if (chart.curves.length) charts.push({element, chart, plot: null, hidden: new Set()});
    else element.append("nothing to show yet");
  }
  const drawAll = () => charts.forEach(draw);

  const controls = document.getElementById("controls");
  if (controls) {
    const inputs = [...controls.querySelectorAll("[name]")], kept = new URLSearchParams(location.hash.slice(1));
    for (const option of controls.querySelectorAll("[name=axis] option")) {
      option.disabled = option.value !== "tokens" && !every(one => option.value in one.others);
    }
    for (const input of inputs) if (kept.has(input.name)) input.value = kept.get(input.name);
    const read = () => {
      const value = name => inputs.find(input => input.name === name).value;
      Object.assign(state, {axis: value("axis") || "tokens", smoothing: Number(value("smoothing")), scale: value("scale")});
      controls.querySelector("output").textContent = state.smoothing.toFixed(2);
    };
    controls.addEventListener("input", () => {
      read();
      location.replace("#" + new URLSearchParams(state));  // so that a page that is loaded anew looks the same
      drawAll();
    });
    controls.querySelector("button").addEventListener("click", () => charts.forEach(card => {
      card.view = "";
      draw(card);
    }));
    controls.hidden = false;
    read();
  }
  drawAll();
  for (const card of charts) new ResizeObserver(() => {
    const width = Math.max(120, card.element.clientWidth - 24);
    if (width !== card.plot.width) card.plot.setSize({width, height: card.chart.height});
  }).observe(card.element);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  // A live page asks its server for what is new; what changes more than the curves, it loads anew.
  function extend(mine, more) {
    const push = (to, from) => {
      to.x.push(...from.x);
      to.y.push(...from.y);
      for (const axis in to.others) to.others[axis].push(...from.others[axis] ?? []);
    };
    push(mine, more);
    mine.texts?.push(...more.texts ?? []);
    if (!mine.mean) return;
    const pending = mine.pending ??= {x: [], y: [], others: Object.fromEntries(Object.keys(mine.others).map(axis => [axis, []]))};
    push(pending, more);
    const {size} = mine.mean, cut = list => list.splice(0, size);
    while (pending.y.length >= size) {
      const values = cut(pending.y), ends = Object.entries(pending.others).map(([axis, list]) => [axis, [cut(list).at(-1)]]);
      push(mine.mean, {x: [cut(pending.x).at(-1)], y: [values.reduce((sum, one) => sum + one) / size], others: Object.fromEntries(ends)});
    }
  }

  function merge(found) {
    for (const chart of found.charts) for (const one of chart.curves) {
      const mine = charts.find(card => card.chart.title === chart.title)?.chart.curves.find(known => known.name === one.name);
      if (!mine || mine.x.length > MANY) return false;
      extend(mine, one);
    }
    for (const [name, text] of found.tiles) {
      const tile = [...document.querySelectorAll(".tiles dt")].find(dt => dt.textContent === name);
      if (!tile) return false;
      tile.nextElementSibling.textContent = text;
    }
    return true;
  }

  const live = document.getElementById("live");
  if (live) {
    let cursor = JSON.parse(live.textContent);
    const told = document.getElementById("told"), every_ms = 2000;
    const poll = async () => {
      let answer;
      try {
        answer = await fetch("lines?" + new URLSearchParams(cursor), {cache: "no-store"});
        if (!answer.ok) throw new Error(await answer.text());
        const found = await answer.json();
        if (found.reload || !merge(found)) return location.reload();
        cursor = found.cursor;
        if (found.charts.length) drawAll();
        told.textContent = `live, ${found.state}; looked at ${new Date().toLocaleTimeString()}`;
        setTimeout(poll, found.more ? 0 : every_ms);
      } catch (error) {
        const why = answer ? error.message : "the server does not answer";
        told.textContent = `not live: ${why}; this is what it said last`;
        setTimeout(poll, 5 * every_ms);
      }
    };
    setTimeout(poll, every_ms);
  }
})();
