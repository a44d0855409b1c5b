"""A record on its way: its own response, an analysis, hinted decoding and retries, each judged, and the fallback.

May import corpus, data/chat and inference's requests. Begin with chain.py, then needs.py and scheduler.py.
"""
