"""Ways to run the jobs of a comparison: processes of this machine, Ray, or torchrun for each job.

Each is a context manager that is called with ``(jobs, root, progress)`` and gives ``{job: error}``. All give the same
results: a job knows its seeds, and its directory holds its state.
"""
