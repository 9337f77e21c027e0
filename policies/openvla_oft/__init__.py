"""OpenVLA-OFT with discrete action tokens, in Flax NNX."""
