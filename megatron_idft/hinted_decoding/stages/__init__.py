"""A record on its way: own response, analysis, hinted decoding, judgement, retry.

May import corpus, data/chat and inference's requests. Begin with pipeline.py, then tasks.py.
"""
