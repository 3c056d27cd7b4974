"""How good a map is: confusion, scores, areas with their uncertainty, a baseline to beat, and pictures of all that.

Nothing here knows networks: whatever made a map, it is judged by its codes alone.
"""
