"""Study: what notebooks need to run and to publish: parameters, stages, the runner, reports, figures.

May import every wing; nothing of the other four imports it.
"""
