"""The embedded world: a scene generator, and a tiny SAM and CLIP that are trained on it."""
