"""Images in: find them, read them, prepare them for the network, and colour heatmaps.

The modules are imported one by one (``from diffcam_fast.images.read import read_image``), so that
nothing here makes ``import diffcam_fast`` slow.
"""
