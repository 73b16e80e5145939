"""Image to pseudo label: SAM finds segments, CLIP names them, thresholds decide.

torch lives here; Ray, MLflow and the student never do.
"""
