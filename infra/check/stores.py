"""A bucket that keeps versions: what a run leaves in it, and the rule that removes what nobody reads.

infra/s3/lifecycle.json is put on a real S3 server as `aws s3api put-bucket-lifecycle-configuration` does. Servers carry
such a rule out once a day or so; that they do isn't tried.
"""

from __future__ import annotations

import json
from pathlib import Path

from chaos.drivers import Job, end
from infra.check.check import ROOT, Check, How, installed, said
from tests.s3 import s3_server

RULE = ROOT / "infra/s3/lifecycle.json"
MOST_BEATS = 25  # versions of a run of a minute's heartbeat
ASKED = """
import json, sys
import boto3
s3, bucket, rule = boto3.client("s3"), sys.argv[1], sys.argv[2:]
s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
if rule:
    s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=json.load(open(rule[0])))
    print(json.dumps(s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]))
pages = s3.get_paginator("list_object_versions").paginate(Bucket=bucket)
print(json.dumps([version["Key"] for page in pages for version in page.get("Versions", [])]))
"""


def versions(work: Path) -> str:
    """A run on a bucket with versions is whole, its heartbeat is a few of them, and the rule is taken as it stands."""
    python = installed("stores", "python", "boto3>=1.40,<2")
    with s3_server(work) as s3:
        uri = s3.make_bucket("night")
        ask: list[str | Path] = [python, "-c", ASKED, "night"]
        environment = {**s3.env, "AWS_DEFAULT_REGION": s3.env["AWS_REGION"]}
        said(ask, env=environment)
        job = Job(work / "job", 300)
        job.environment = s3.env
        ended = end(job.start(f"output.path={uri}/out", "+engine.options.tokens_per_s=800"))
        assert ended.code == 0, ended.err[-1500:]
        assert "300 = 300 answers + 0 failures" in ended.out, ended.out
        job.verb = ["verify"]
        checked = end(job.start(f"output.path={uri}/out"))
        assert checked.code == 0, checked.out + checked.err
        told, keys = said([*ask, RULE], env=environment).strip().splitlines()[-2:]
    wanted, has = json.loads(RULE.read_text())["Rules"], json.loads(told)
    for name in ("Status", "NoncurrentVersionExpiration", "AbortIncompleteMultipartUpload"):
        assert has[0].get(name) == wanted[0][name], f"{name}: {has[0].get(name)}"
    beats = sum(key.endswith(".beat.json") for key in json.loads(keys))
    data = [key for key in json.loads(keys) if "/data/" in key]
    assert 2 <= beats <= MOST_BEATS and len(data) == len(set(data)), f"{beats} beats, {len(data)} data objects"
    return f"{len(json.loads(keys))} versions, {beats} of the heartbeat; no data object twice"


CHECKS = [Check("stores", "a run on a bucket with versions; the lifecycle rule is taken", How.RAN, versions)]
