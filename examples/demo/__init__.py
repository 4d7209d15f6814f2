"""The main job, shown: pre-forked workers under load behind one cap, killed on the way, counted by the back end."""
