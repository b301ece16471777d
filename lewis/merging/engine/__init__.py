"""The two engines that merge a tensor: compiled loops for the processor, and the methods in torch."""
