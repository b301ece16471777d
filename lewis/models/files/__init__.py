"""Files of a model folder: which ones count, safetensors read in place, and a checkpoint written tensor by tensor."""
