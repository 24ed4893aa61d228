"""The conversation viewer: a run's record as one HTML file that needs no server and no network"""
