"""Recordings of robots, on disk in several formats: read and written an episode at a time.

Each format is one file here, with its reading beside its writing. A *source* is a dataset that is there, a *target* one that is made; what
passes between them are `recording.Recording`s, whose frames are decoded while they are asked for. `convert` and `inspection` are commands.
"""
