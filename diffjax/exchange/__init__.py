"""Networks of other code, in and out: published files and folders, and portable programs."""
