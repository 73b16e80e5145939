"""`zsplg submit`: any verb as a job on a Ray cluster. See job.py."""
