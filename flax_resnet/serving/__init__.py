"""The demo page: what it computes (``answers``) and what it shows (``page``)."""
