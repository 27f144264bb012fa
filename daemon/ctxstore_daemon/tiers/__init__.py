"""What the tiers of a node stand on."""
