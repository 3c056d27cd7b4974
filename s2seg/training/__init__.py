"""Training: the scenes that mapping reads, cut into chips, split by place, and fitted with a network."""
