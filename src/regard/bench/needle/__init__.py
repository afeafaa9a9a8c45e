"""What interventions cost and keep: notes asked for at every length and depth, with the cache as it is then.

`measure.py` times and scores, `page.py` shows; `regard needle` is the command.
"""
