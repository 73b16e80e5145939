"""Results for people: scores, pictures. Reads runs through records and rundir; never Ray."""
