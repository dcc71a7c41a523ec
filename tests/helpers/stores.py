"""A local S3 server with fault injection."""

from __future__ import annotations

import contextlib
import os
import re
import threading

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import make_server

__all__ = ["BUCKET", "ENVIRONMENT", "S3", "serve_s3"]

BUCKET = "bucket"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "2",  # per call, in addition to the retries of fsspec
}


class S3:
    """An S3 server on a local port.

    After `fail`, the first `times` requests whose method and path match get the response `status`,
    or all of them if `times` is None. `requests` records every request.
    """

    def __init__(self):
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.requests = []
        self._lock = threading.Lock()
        self.work()
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def work(self):
        """Stop injecting faults."""
        self.fail("never", "never", 503, 0)

    def fail(self, method, path, status, times=None):
        """Inject faults into requests whose method and path match regular expressions."""
        self._failing = re.compile(method), re.compile(path)
        self._status, self._times = status, times

    def _fails(self, method, path):
        with self._lock:
            self.requests.append((method, path))
            matches = self._failing[0].fullmatch(method) and self._failing[1].search(path)
            if not matches or self._times == 0:
                return False
            self._times = None if self._times is None else self._times - 1
            return True

    def _serve(self, environ, start_response):
        if not self._fails(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            return self._application(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code = {403: "AccessDenied", 503: "SlowDown"}[self._status]
        start_response(f"{self._status} {code}", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()]

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def client(self):
        return boto3.client("s3", endpoint_url=self.url)

    def objects(self):
        """Return the content of every object in the bucket, by key."""
        client = self.client()
        listed = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        keys = [each["Key"] for each in listed]
        return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}

    def clear(self):
        """Remove every object; servers in one process share their buckets."""
        client = self.client()
        for key in self.objects():
            client.delete_object(Bucket=BUCKET, Key=key)


@contextlib.contextmanager
def serve_s3():
    """Serve S3 to this process and its children."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        with S3() as server:
            os.environ["AWS_ENDPOINT_URL"] = server.url
            S3FileSystem.clear_instance_cache()  # may refer to a previous server
            server.client().create_bucket(Bucket=BUCKET)
            server.clear()
            yield server
    finally:
        os.environ.clear()
        os.environ.update(before)
