"""The review loop: which images a person should correct, and what comes back from them."""
