"""The part of the engine that computes: step plans in, sampled tokens out."""
