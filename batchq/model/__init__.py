"""A model: where it comes from, its folder, its tensors, its key-value cache, its quantization schemes. No torch."""
