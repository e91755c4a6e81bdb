"""Ways to run the jobs of a comparison: processes of this machine, Ray, or torchrun for each job.

Each has one function, ``run(jobs, root, ..., progress) -> {job: error}``. All give the same results: a job knows its
seeds, and its directory holds its state.
"""
