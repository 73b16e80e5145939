"""What this machine can do and what to mend, before a long job finds out."""
