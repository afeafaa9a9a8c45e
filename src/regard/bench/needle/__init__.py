"""What interventions cost and keep: what is hidden is asked for at every length and depth, with the cache as it is then.

`cases.py` hides and scores, `ways.py` reads interventions, `measure.py` asks and times, `page.py` shows; `regard needle`.
"""
