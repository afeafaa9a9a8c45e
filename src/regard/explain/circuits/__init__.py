"""What parts of a model do together, and what a mixer is as a system in time."""
