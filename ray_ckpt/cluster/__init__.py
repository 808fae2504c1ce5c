"""Ray, and its only home: worker groups, and how to reach a cluster."""
