"""URDF files as PyBullet loads them fastest: without what is not needed, and with smaller hulls."""
