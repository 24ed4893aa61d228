"""The doctor: looks at a machine, an environment and a config before a run, and names the way out of each problem"""
