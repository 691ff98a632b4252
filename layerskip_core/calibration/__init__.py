"""Better int4 weights, from text that the model itself wrote: `layerskip calibrate`."""
