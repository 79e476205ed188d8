"""Reports: HTML pages and plots of a run, of a sweep, and of the objectives."""
