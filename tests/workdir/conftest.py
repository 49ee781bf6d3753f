"""A Google Cloud Storage server in memory, for the tests of object stores.

It has the part of the JSON API that gcsfs, google-cloud-storage and TensorStore
use for runs, with generations and preconditions, which emulators on PyPI lack.
"""

import base64
import contextlib
import email.parser
import email.policy
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse

import pytest

from fsq_jax.workdir import files

_REASON = 'needs the extra gcs: pip install gcsfs google-cloud-storage'
_TIME = '2026-01-01T00:00:00.000Z'


class _Server(http.server.ThreadingHTTPServer):
  """Objects of one bucket: name to (generation, bytes)."""

  daemon_threads = True
  request_queue_size = 64

  def __init__(self):
    super().__init__(('localhost', 0), _Handler)
    self.objects = {}
    self.lock = threading.Lock()
    self.generation = 0
    self.uploads = {}
    # Part of the names to which access is denied.
    self.denied = None
    # Part of the names whose uploads wait.
    self.blocked = None

  @contextlib.contextmanager
  def blocked_at(self, part):
    self.blocked = part
    try:
      yield
    finally:
      self.blocked = None

  @property
  def url(self):
    return f'http://localhost:{self.server_address[1]}'


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers requests; an error is a status without further text."""

  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True  # Otherwise each answer takes 40 ms.

  def log_message(self, *_):
    pass

  def do_GET(self):
    self._handle()

  do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

  def _handle(self):
    url = urllib.parse.urlsplit(self.path)
    self.query = dict(urllib.parse.parse_qsl(url.query))
    self.body = self._read_body()
    path = url.path.replace('/download/', '/').replace('/upload/', '/')
    path = path.removeprefix('/storage/v1')
    while self._is_blocked():
      time.sleep(0.1)
    with self.server.lock:
      if path.startswith('/batch'):
        return self._batch()
      if not (match := re.fullmatch(r'/b/bucket(/o(/.*)?)?', path)):
        return self._send(404)
      if match[1] is None:
        return self._send_json({'name': 'bucket', 'kind': 'storage#bucket'})
      if not match[2]:
        return self._list() if self.command == 'GET' else self._upload()
      parts = match[2][1:].split('/')
      name = urllib.parse.unquote(parts[0])
      if len(parts) > 1 and parts[1] in ('copyTo', 'rewriteTo'):
        return self._copy(name, urllib.parse.unquote(parts[-1]))
      name = urllib.parse.unquote(match[2][1:])
      if self.server.denied and self.server.denied in name:
        return self._send(403)
      if not self._meets_conditions(name):
        return None
      if self.command == 'DELETE':
        found = self.server.objects.pop(name, None)
        return self._send(204 if found else 404)
      return self._get(name)

  def _is_blocked(self):
    part = self.server.blocked
    # Some uploads have the name in their body.
    head = self.body[:1000].decode(errors='replace')
    return part and (part in self.query.get('name', '') or part in head)

  def _read_body(self):
    if self.headers.get('Transfer-Encoding') == 'chunked':
      chunks = []
      while size := int(self.rfile.readline(), 16):
        chunks.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b''.join(chunks)
    return self.rfile.read(int(self.headers.get('Content-Length', 0)))

  def _meets_conditions(self, name):
    generation = self.server.objects.get(name, (0, b''))[0]
    wanted = self.query.get('ifGenerationMatch')
    if wanted is not None and int(wanted) != generation:
      self._send(412)
    elif int(self.query.get('generation') or generation) != generation:
      self._send(404)
    elif self.query.get('ifGenerationNotMatch') == str(generation):
      self._send(304)
    else:
      return True
    return False

  def _upload(self):
    if 'upload_id' in self.query:  # The only part of a resumable upload.
      name, self.query = self.server.uploads.pop(self.query['upload_id'])
      data = self.body
    elif self.query['uploadType'] == 'resumable':
      key = str(len(self.server.uploads))
      name = self.query.get('name') or json.loads(self.body)['name']
      self.server.uploads[key] = name, self.query
      url = f'{self.server.url}/upload/storage/v1/b/bucket/o'
      return self._send(200, b'', {'Location': f'{url}?upload_id={key}'})
    elif self.query['uploadType'] == 'multipart':
      head = f'Content-Type: {self.headers["Content-Type"]}\n\n'.encode()
      # A parser of mail would change line ends of binary content.
      boundary = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
          head
      ).get_boundary()
      _, meta, content, _ = self.body.split(f'--{boundary}'.encode())
      split = re.compile(rb'\r?\n\r?\n')
      name = json.loads(split.split(meta, maxsplit=1)[1])['name']
      data = split.split(content, maxsplit=1)[1]
      data = data.removesuffix(b'\n').removesuffix(b'\r')
    else:
      name, data = self.query['name'], self.body
    if self._meets_conditions(name):
      self._store(name, data)
      self._send_json(self._describe(name))

  def _store(self, name, data):
    self.server.generation += 1
    self.server.objects[name] = self.server.generation, data

  def _describe(self, name):
    import google_crc32c

    generation, data = self.server.objects[name]
    crc = google_crc32c.value(data).to_bytes(4, 'big')
    return {
        'kind': 'storage#object',
        'name': name,
        'bucket': 'bucket',
        'generation': str(generation),
        'metageneration': '1',
        'size': str(len(data)),
        'timeCreated': _TIME,
        'updated': _TIME,
        'md5Hash': base64.b64encode(hashlib.md5(data).digest()).decode(),
        'crc32c': base64.b64encode(crc).decode(),
    }

  def _list(self):
    prefix = self.query.get('prefix', '')
    delimiter = self.query.get('delimiter')
    names, prefixes = [], set()
    for name in sorted(self.server.objects):
      rest = name[len(prefix) :]
      if not name.startswith(prefix):
        continue
      if delimiter and delimiter in rest:
        prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
      else:
        names.append(name)
    first = self.query.get('startOffset', '')
    names = [x for x in names if x >= first]
    self._send_json({
        'items': [self._describe(x) for x in names],
        'prefixes': sorted(prefixes),
    })

  def _get(self, name):
    if name not in self.server.objects:
      return self._send(404)
    if self.query.get('alt') != 'media':
      return self._send_json(self._describe(name))
    generation, data = self.server.objects[name]
    headers = {'X-Goog-Generation': str(generation)}
    status = 200
    if match := re.fullmatch(
        r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')
    ):
      start, end = int(match[1]), int(match[2] or len(data) - 1)
      if start >= len(data):
        return self._send(416)
      end = min(end, len(data) - 1)
      headers['Content-Range'] = f'bytes {start}-{end}/{len(data)}'
      data, status = data[start : end + 1], 206
    return self._send(status, data, headers)

  def _copy(self, source, target):
    if source not in self.server.objects:
      return self._send(404)
    self._store(target, self.server.objects[source][1])
    resource = self._describe(target)
    return self._send_json(
        {'done': True, 'resource': resource}
        if 'rewriteTo' in self.path
        else resource
    )

  def _batch(self):
    names = re.findall(rb'DELETE /storage/v1/b/bucket/o/(\S+) HTTP', self.body)
    answers = []
    for name in names:
      name = urllib.parse.unquote(name.decode())
      found = self.server.objects.pop(name, None)
      code = '204 No Content' if found else '404 Not Found'
      answers.append(f'--batch\r\n\r\nHTTP/1.1 {code}\r\n\r\n')
    body = ''.join(answers) + '--batch--'
    kind = {'Content-Type': 'multipart/mixed; boundary=batch'}
    self._send(200, body.encode(), kind)

  def _send_json(self, value):
    kind = {'Content-Type': 'application/json'}
    self._send(200, json.dumps(value).encode(), kind)

  def _send(self, status, body=b'', headers=()):
    self.send_response(status)
    for name, value in dict(headers).items():
      self.send_header(name, value)
    if status not in (204, 304):
      self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if status not in (204, 304):
      self.wfile.write(body)


@pytest.fixture(scope='session')
def store():
  """Yields the server, which this process and its children use as gs://."""
  with _Server() as server, pytest.MonkeyPatch.context() as patch:
    # Otherwise gcsfs asks Google for the type of the bucket.
    patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    pytest.importorskip('gcsfs', reason=_REASON)
    pytest.importorskip('google.cloud.storage', reason=_REASON)
    patch.setenv('STORAGE_EMULATOR_HOST', server.url)
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', server.url)
    patch.setenv('GOOGLE_CLOUD_PROJECT', 'test')
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def folder(store, request, tmp_path, monkeypatch):
  """Yields a new folder in the store; no local folder gs: may appear."""
  monkeypatch.chdir(tmp_path)
  yield files.create(f'gs://bucket/{request.node.name}/run', stores=('gs',))
  assert not list(tmp_path.glob('*:*'))
