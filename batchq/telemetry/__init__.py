"""What a run tells machines that watch it: Prometheus, OpenLineage, OpenTelemetry.

    metrics.py    what is measured: every metric with its kind, labels and words, and the values of a run
    delivery.py   the last values, to node exporter's textfile collector and to a Pushgateway
    lineage.py    OpenLineage's events
    traces.py     OpenTelemetry's spans

Nothing here ends a run: what can't be delivered is a warning.
"""
