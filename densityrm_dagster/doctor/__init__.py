"""`densityrm doctor`: what this machine is, what will be used, and whether what the experiment needs is here.

Begin with `examination`; a file beside it has the checks of one subject.
"""
