"""The demonstration behind `resfuse demo`: real images through stock and fused networks, compared and timed."""
