"""A job from its configuration to its report, and the steps that ask engines before the corpus is labelled."""
