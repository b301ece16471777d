"""The merge engine: streams a checkpoint tensor by tensor, in compiled loops or in torch."""
