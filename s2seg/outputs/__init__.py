"""What a run leaves behind: Zarr, Cloud-Optimized GeoTIFF, STAC item and quicklook.

Nothing here knows where pixels come from or which network made them: the input is a prediction and its legend.
"""
