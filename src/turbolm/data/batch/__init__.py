"""Global batches as arrays: dealt to ranks and micro-batches, prefetched."""
