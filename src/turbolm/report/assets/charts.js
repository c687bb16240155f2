// Draws every chart of the page with uPlot. Drag zooms, a double click shows everything, a click in the legend hides a curve.
"use strict";
(() => {
  const compact = Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 2});
  const short = value => value == null ? "–" : Math.abs(value) >= 1e4 ? compact.format(value) : String(Number(value.toPrecision(4)));
  const font = '12px system-ui, -apple-system, "Segoe UI", sans-serif';

  function options(chart, width) {
    const css = getComputedStyle(document.documentElement), color = name => css.getPropertyValue("--" + name);
    const axis = {
      stroke: color("muted"), font, labelFont: font, labelSize: 18, values: (plot, ticks) => ticks.map(tick => tick == null ? "" : short(tick)),
      grid: {stroke: color("grid"), width: 1}, ticks: {stroke: color("grid"), width: 1, size: 5},
    };
    // A few spikes must not flatten the rest. A zoom into a spike shows it.
    const clip = (low, high) => chart.clip_above !== null && low < chart.clip_above ? Math.min(high, chart.clip_above) : high;
    const range = (plot, low, high) => low === null ? [0, 1]
      : uPlot.rangeNum(chart.from_zero ? Math.min(0, low) : low, clip(low, high), 0.05, chart.from_zero);
    const markResumes = plot => {
      const {ctx, bbox} = plot;
      ctx.save();
      ctx.strokeStyle = color("muted");
      ctx.setLineDash([2 * uPlot.pxRatio, 4 * uPlot.pxRatio]);
      for (const at of chart.resumes) {
        const across = plot.valToPos(at, "x", true);
        if (across < bbox.left || across > bbox.left + bbox.width) continue;
        ctx.beginPath();
        ctx.moveTo(across, bbox.top);
        ctx.lineTo(across, bbox.top + bbox.height);
        ctx.stroke();
      }
      ctx.restore();
    };
    const curve = one => ({
      label: one.name, stroke: color(one.color), value: (plot, value) => short(value),
      width: one.style === "faint" ? 1 : 1.8, alpha: one.style === "faint" ? 0.35 : 1,
      dash: one.style === "dashed" ? [6, 4] : [],
      points: one.style === "points" || one.x.length === 1 ? {show: true, size: 6, fill: color("card")} : {show: false},
    });
    return {
      width, height: chart.height, series: [{label: chart.x_label, value: (plot, value) => short(value)}, ...chart.curves.map(curve)],
      scales: {
        x: chart.logarithmic.includes("x") ? {time: false, distr: 3, log: 2} : {time: false},
        y: chart.logarithmic.includes("y") ? {distr: 3, log: 10} : {range},
      },
      axes: [{...axis, label: chart.x_label, size: 34}, {...axis, size: 54}],
      cursor: {sync: {key: chart.x_label, setSeries: false}}, hooks: {drawClear: [markResumes]},
    };
  }

  for (const card of document.querySelectorAll(".chart")) {
    const chart = JSON.parse(card.querySelector("script").textContent);
    if (!chart.curves.length) {
      card.append("nothing to show yet");
      continue;
    }
    const data = uPlot.join(chart.curves.map(one => [one.x, one.y]));
    let plot = null;
    const draw = () => {
      plot?.destroy();
      plot = new uPlot(options(chart, card.clientWidth - 24), data, card);
    };
    draw();
    new ResizeObserver(() => plot.setSize({width: card.clientWidth - 24, height: chart.height})).observe(card);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }
})();
