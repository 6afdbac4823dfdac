"""What fewer bits cost a model, layer by layer, and which bits to choose."""
