"""From STAC catalogs to lazy arrays: search, radiometry, reading, stacking, compositing."""
