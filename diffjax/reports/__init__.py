"""Pages and plots: a run's page, a sweep's page, the objectives' page."""
