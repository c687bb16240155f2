"""The trainer. Run it with `turbolm train RECIPE`, or by hand with `accelerate launch ... -m turbolm.train`."""
