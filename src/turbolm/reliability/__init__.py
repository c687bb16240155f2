"""Keep runs alive and honest: stops, hangs, anomalies, replicas, one writer per run, and how attempts ended."""
