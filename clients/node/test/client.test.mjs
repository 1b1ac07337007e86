// Calls, errors, tokens and retries, against a fake server.
import assert from 'node:assert/strict'
import { mock, suite, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'

import { ChatSession, ChatTicketClient, ChatTicketError, channelOptions, credentials, status } from 'chat-ticket-client'

import { BadRequest, ResourceInfo } from '../dist/generated/google/rpc/error_details.js'
import { cancelled, pack, refusal, serve } from './fake.mjs'

mock.method(Math, 'random', () => 0) // no pauses but those that a server asks for

/** A handler that fails with each error in turn, and then answers. */
function failing(...errors) {
  const requests = []
  const handler = (call, callback) => {
    requests.push(call.request)
    const error = errors[requests.length - 1]
    if (error) callback(error)
    else callback(null, { session: ChatSession.fromPartial({ id: call.request.session?.id }) })
  }
  return { handler, requests }
}

async function caught(promise) {
  try {
    await promise
  } catch (error) {
    return error
  }
  assert.fail('it did not fail')
}

suite('calls', () => {
  test('keep large numbers, and fill in what a request leaves out', async (t) => {
    let asked
    const client = await serve(t, {
      createChatSession(call, callback) {
        asked = call.request
        callback(null, { session: ChatSession.fromPartial({ revision: 9007199254740993n }) })
      },
      listChatMessages(call) {
        asked = call.request
        call.end()
      },
    })
    const { session } = await client.sessions.createChatSession({ session: { id: 'an id' } })
    assert.equal(session.revision, 9007199254740993n)
    assert.equal(asked.session.status, 'CHAT_SESSION_STATUS_UNSPECIFIED')
    for await (const _ of client.messages.listChatMessages({ sessionId: 'x', afterSequence: 2n ** 62n + 1n })) {
      assert.fail('it is empty')
    }
    assert.equal(asked.afterSequence, 2n ** 62n + 1n)
  })

  test('name the tenant and carry more metadata', async (t) => {
    let metadata
    const client = await serve(t, {
      getChatSession(call, callback) {
        metadata = call.metadata
        callback(null, {})
      },
    })
    await client.sessions.getChatSession({ sessionId: 'x' })
    assert.deepEqual(metadata.get('x-tenant-id'), ['acme'])
    assert.deepEqual(metadata.get('authorization'), [])
  })

  test('stream requests and responses', async (t) => {
    const requests = []
    const client = await serve(t, {
      writeChatDraft(call) {
        call.on('data', ({ request }) => {
          requests.push(request.$case)
          call.write({ response: { $case: 'written', value: { length: BigInt(requests.length) } } })
          if (request.$case === 'finish') call.end()
        })
        call.on('end', () => requests.push('end'))
      },
    })
    const lengths = []
    async function* write() {
      yield { request: { $case: 'start', value: { sessionId: 'x' } } }
      while (lengths.length < 2) {
        yield { request: { $case: 'append', value: { text: 'a' } } }
        await sleep(20)
      }
      yield { request: { $case: 'finish', value: {} } }
    }
    for await (const { response } of client.drafts.writeChatDraft(write())) lengths.push(response.value.length)
    assert.deepEqual(lengths, requests.filter((each) => each !== 'end').map((_, index) => BigInt(index + 1)))
    assert.deepEqual([requests[0], requests.at(-1)], ['start', 'end'])

    const reason = new Error('of the model')
    async function* fail() {
      yield { request: { $case: 'start', value: { sessionId: 'x' } } }
      throw reason
    }
    assert.equal(await caught(client.drafts.writeChatDraft(fail()).next()), reason)
  })

  test('end at their deadline, or that of the client', async (t) => {
    const client = await serve(t, { createChatSession() {} }, { timeoutMs: 50 })
    const late = await caught(client.sessions.createChatSession({}))
    assert.ok(late instanceof ChatTicketError)
    assert.equal(late.code, status.DEADLINE_EXCEEDED)
    const start = performance.now()
    await caught(client.sessions.createChatSession({}, { timeoutMs: 300 }))
    assert.ok(performance.now() - start > 250)
  })

  test('end when they are aborted or the client is closed in the same tick', async (t) => {
    const { handler, requests } = failing()
    const client = await serve(t, { createChatSession: handler, watchChatSession: () => {} })
    const abort = new AbortController()
    const reason = new Error('changed my mind')
    const created = client.sessions.createChatSession({}, { signal: abort.signal })
    const watched = client.watch('an id', { signal: abort.signal }).next()
    const left = client.watch('an id')
    const next = left.next()
    const returned = left.return()
    abort.abort(reason)
    assert.equal(await caught(created), reason)
    assert.equal(await caught(watched), reason)
    assert.equal((await returned).done, true)
    assert.equal((await next).done, true)
    assert.equal(requests.length, 0)
    const last = client.sessions.createChatSession({})
    client.close()
    assert.match((await caught(last)).message, /the client is closed/)
  })

  test('end when their signal is aborted, also while the token is awaited', async (t) => {
    let call
    const reason = new Error('no longer wanted')
    const abort = new AbortController()
    const client = await serve(t, {
      createChatSession(each) {
        call = each
        abort.abort(reason)
      },
    })
    assert.equal(await caught(client.sessions.createChatSession({}, { signal: abort.signal })), reason)
    await cancelled(call)

    const stuck = await serve(t, {}, { token: () => new Promise(() => {}) })
    const signal = AbortSignal.timeout(20)
    assert.equal(await caught(stuck.sessions.createChatSession({}, { signal })), signal.reason)
    const before = AbortSignal.abort(reason)
    assert.equal(await caught(client.sessions.createChatSession({}, { signal: before })), reason)
  })

  test('end when the client is closed', async (t) => {
    const client = await serve(t, { createChatSession() {} })
    const pending = caught(client.sessions.createChatSession({}))
    await sleep(50)
    client.close()
    assert.match((await pending).message, /client is closed/)
    assert.match((await caught(client.sessions.createChatSession({}))).message, /client is closed/)
    await assert.rejects(client.watch('x').next(), /client is closed/)
  })

  test('that stream end at the server when they are left', async (t) => {
    const streams = []
    const client = await serve(t, {
      listChatMessages(call) {
        streams.push(call)
        call.write({ messages: [] })
      },
    })
    for await (const _ of client.messages.listChatMessages({ sessionId: 'x' })) break
    await cancelled(streams[0])

    const held = client.messages.listChatMessages({ sessionId: 'x' })
    await held.next()
    const waiting = held.next()
    await held.return()
    assert.deepEqual(await waiting, { done: true, value: undefined })
    await cancelled(streams[1])
  })

  test('that read are retried by gRPC, and writes are not', async (t) => {
    const unavailable = refusal(status.UNAVAILABLE, 'OVERLOADED')
    const read = failing(unavailable, unavailable)
    const write = failing(unavailable)
    const client = await serve(t, { getChatSession: read.handler, createChatSession: write.handler })
    await client.sessions.getChatSession({ sessionId: 'x' })
    assert.equal(read.requests.length, 3)
    await caught(client.sessions.createChatSession({}))
    assert.equal(write.requests.length, 1)
  })

  test('go to all addresses of a target', () => {
    const config = JSON.parse(channelOptions('localhost:1')['grpc.service_config'])
    assert.deepEqual(config.loadBalancingConfig, [{ round_robin: {} }])
    assert.equal(channelOptions('localhost:1')['grpc.enable_http_proxy'], 0)
    assert.equal(channelOptions('chat.example:1')['grpc.enable_http_proxy'], undefined)
    assert.equal(channelOptions('x', { 'grpc.keepalive_time_ms': 1 })['grpc.keepalive_time_ms'], 1)
  })
})

suite('errors', () => {
  test('have all details that the service sends', async (t) => {
    const details = [
      pack('google.rpc.BadRequest', BadRequest, {
        fieldViolations: [
          { field: 'session.id', description: 'not a UUID' },
          { field: 'session.status', description: 'unknown' },
        ],
      }),
      pack('google.rpc.ResourceInfo', ResourceInfo, { resourceName: 'a name' }),
      pack('google.rpc.OfTomorrow', ResourceInfo, {}),
      { typeUrl: 'type.googleapis.com/google.rpc.QuotaFailure', value: Buffer.from([255]) },
    ]
    const client = await serve(t, {
      createChatSession: failing(
        refusal(status.INVALID_ARGUMENT, 'INVALID_ARGUMENT', { details, retrySeconds: 1.5, message: 'all wrong: ü' }),
      ).handler,
    })
    const error = await caught(client.sessions.createChatSession({}))
    assert.ok(error instanceof ChatTicketError)
    assert.equal(error.code, status.INVALID_ARGUMENT)
    assert.equal(error.codeName, 'INVALID_ARGUMENT')
    assert.equal(error.reason, 'INVALID_ARGUMENT')
    assert.equal(error.statusMessage, 'all wrong: ü')
    assert.equal(String(error), 'ChatTicketError: INVALID_ARGUMENT: all wrong: ü')
    assert.deepEqual(error.violations, [
      { field: 'session.id', description: 'not a UUID' },
      { field: 'session.status', description: 'unknown' },
    ])
    assert.equal(error.retrySeconds, 1.5)
    assert.equal(error.cause.code, status.INVALID_ARGUMENT)
    assert.deepEqual(
      error.details.map(({ type }) => type),
      [
        'google.rpc.ErrorInfo',
        'google.rpc.BadRequest',
        'google.rpc.ResourceInfo',
        'google.protobuf.Any',
        'google.protobuf.Any',
        'google.rpc.RetryInfo',
      ],
    )
    assert.equal(error.details[2].value.resourceName, 'a name')
  })

  test('that are not from the service have no reason', async (t) => {
    const other = refusal(status.NOT_FOUND, 'A_REASON')
    const handler = failing(
      { code: status.NOT_FOUND, details: 'no details' },
      { ...other, code: status.PERMISSION_DENIED }, // the details say NOT_FOUND
      { ...other, details: 'another text' },
      refusal(status.NOT_FOUND, '', { packed: Buffer.from([255]) }),
    ).handler
    const client = await serve(t, { createChatSession: handler })
    for (let i = 0; i < 4; i += 1) {
      const error = await caught(client.sessions.createChatSession({}))
      assert.equal(error.reason, '')
      assert.deepEqual(error.details, [])
      assert.match(error.message, /^(NOT_FOUND|PERMISSION_DENIED): /)
    }
  })

  test('are thrown by streams too', async (t) => {
    const client = await serve(t, {
      listChatMessages(call) {
        call.write({ messages: [] })
        call.emit('error', refusal(status.NOT_FOUND, 'CHAT_SESSION_NOT_FOUND'))
      },
    })
    const stream = client.messages.listChatMessages({ sessionId: 'x' })
    assert.equal((await stream.next()).done, false)
    assert.equal((await caught(stream.next())).reason, 'CHAT_SESSION_NOT_FOUND')
  })
})

suite('tokens', () => {
  test('are strings, or come from a function for each call', async (t) => {
    const seen = []
    const getChatSession = (call, callback) => {
      seen.push(...call.metadata.get('authorization'))
      callback(null, {})
    }
    let count = 0
    for (const token of ['fixed', () => `sync ${++count}`, async () => `async ${++count}`]) {
      const client = await serve(t, { getChatSession }, { token })
      await client.sessions.getChatSession({ sessionId: 'x' })
      await client.sessions.getChatSession({ sessionId: 'x' })
    }
    const tokens = ['fixed', 'fixed', 'sync 1', 'sync 2', 'async 3', 'async 4']
    assert.deepEqual(seen, tokens.map((token) => `Bearer ${token}`))
  })

  test('that cannot be had fail the call', async (t) => {
    const failure = new Error('no token')
    const token = () => {
      throw failure
    }
    const client = await serve(t, {}, { token })
    assert.equal(await caught(client.sessions.getChatSession({ sessionId: 'x' })), failure)
    assert.equal(await caught(client.watch('x').next()), failure)
  })

  test('are not sent in plain text to another machine', () => {
    const elsewhere = [
      'chat.example:443',
      'dns:///chat.example:443',
      'dns://127.0.0.1/chat.example',
      'dns:chat.example/localhost',
      'dns://8.8.8.8/localhost', // an answer of another DNS server
      '10.0.0.1:50051',
      'ipv4:127.0.0.1:1,10.0.0.1:1',
      'localhost.example:50051',
      'user@localhost:1',
      '[::2]:50051',
      '::2',
      'xds:///localhost',
      'unix-abstract:chat', // grpc-js takes it for a name of DNS
      'UNIX:/run/chat.sock', // and this
      '',
    ]
    for (const target of elsewhere) {
      for (const more of [{}, { credentials: credentials.createInsecure() }]) {
        assert.throws(() => new ChatTicketClient(target, { token: 'secret', ...more }), {
          name: 'TypeError',
          message: `token: not sent in plain text to ${target}; set credentials`,
        })
      }
    }
    const here = [
      'localhost:50051',
      'dns:///localhost:50051',
      'dns:LOCALHOST',
      '127.0.0.1:50051',
      'ipv4:127.0.0.1:1,127.0.0.2:1',
      '[::1]:50051',
      '::1',
      'ipv6:[::1]:50051',
      'unix:/run/chat.sock',
      'unix:///run/chat.sock',
    ]
    for (const target of here) new ChatTicketClient(target, { token: 'secret' }).close()
    new ChatTicketClient('chat.example:443', { token: 'secret', credentials: credentials.createSsl() }).close()
    new ChatTicketClient('chat.example:443', { tenant: 'acme' }).close()
  })

  test('must be printable ASCII, and are never shown', async (t) => {
    for (const bad of [{ token: 'secret\n' }, { tenant: 'secret\n' }, { tenant: 'secret café' }]) {
      assert.throws(() => new ChatTicketClient('localhost:1', bad), (error) => {
        assert.match(error.message, /^(token|tenant): not printable ASCII/)
        assert.doesNotMatch(error.message, /secret/)
        return error instanceof TypeError
      })
    }
    const client = await serve(t, {}, { token: () => 'secret\n' })
    await assert.rejects(client.sessions.getChatSession({ sessionId: 'x' }), TypeError)
    await assert.rejects(client.watch('x').next(), TypeError)
  })

  test('must come, as a string, within the time of the call', async (t) => {
    const absent = await serve(t, {}, { token: async () => undefined })
    await assert.rejects(absent.sessions.getChatSession({ sessionId: 'x' }), /token: undefined, must be a string/)
    const never = await serve(t, {}, { token: () => new Promise(() => {}) })
    const error = await caught(never.sessions.getChatSession({ sessionId: 'x' }, { timeoutMs: 50 }))
    assert.equal(error.code, status.DEADLINE_EXCEEDED)
    const waiting = caught(never.sessions.getChatSession({ sessionId: 'x' }))
    never.close()
    assert.match((await waiting).message, /the client is closed/)
  })
})

suite('retry', () => {
  test('makes the same call until it succeeds', async (t) => {
    const { handler, requests } = failing(
      refusal(status.UNAVAILABLE, 'OUTCOME_UNKNOWN'),
      refusal(status.DEADLINE_EXCEEDED, ''),
      refusal(status.CANCELLED, ''),
      refusal(status.UNKNOWN, ''),
      refusal(status.INTERNAL, ''),
      refusal(status.RESOURCE_EXHAUSTED, 'QUOTA_EXCEEDED', { retrySeconds: 0.2 }),
    )
    const client = await serve(t, { createChatSession: handler })
    const start = performance.now()
    const request = { session: { id: 'an id' } }
    const { session } = await client.retry(client.sessions.createChatSession, request)
    assert.equal(session.id, 'an id')
    assert.deepEqual(requests.map((each) => each.session.id), Array(7).fill('an id'))
    assert.ok(performance.now() - start >= 190, 'it waits as long as the server asks for')
  })

  test('does not repeat calls that cannot succeed', async (t) => {
    const errors = [
      refusal(status.NOT_FOUND, 'CHAT_SESSION_NOT_FOUND'),
      refusal(status.RESOURCE_EXHAUSTED, 'QUOTA_EXCEEDED'),
      refusal(status.INTERNAL, 'INTERNAL'),
      refusal(status.ABORTED, 'ETAG_MISMATCH'),
    ]
    const { handler, requests } = failing(...errors)
    const client = await serve(t, { createChatSession: handler })
    for (const { code } of errors) {
      const request = { session: { id: 'an id' } }
      assert.equal((await caught(client.retry(client.sessions.createChatSession, request))).code, code)
    }
    assert.equal(requests.length, errors.length)
  })

  test('gives up in time with the last error, or when it is aborted', async (t) => {
    const late = refusal(status.UNAVAILABLE, 'DRAINING', { retrySeconds: 60 })
    const client = await serve(t, { createChatSession: failing(late, late).handler })
    const create = client.sessions.createChatSession
    const request = { session: { id: 'an id' } }
    const error = await caught(client.retry(create, request, { timeoutMs: 1000 }))
    assert.equal(error.reason, 'DRAINING')
    const signal = AbortSignal.timeout(50)
    assert.equal(await caught(client.retry(create, request, { timeoutMs: 120_000, signal })), signal.reason)
  })

  test('ends in time when the server does not answer', async (t) => {
    const client = await serve(t, { createChatSession: () => {} })
    const start = performance.now()
    const request = { session: { id: 'an id' } }
    const error = await caught(client.retry(client.sessions.createChatSession, request, { timeoutMs: 300 }))
    assert.equal(error.code, status.DEADLINE_EXCEEDED)
    assert.ok(performance.now() - start < 5_000, 'not the 10 seconds of a call')
  })

  test('sends nothing that is not safe to repeat', async (t) => {
    const client = await serve(t, {})
    const { sessions, messages, attachments, tickets } = client
    const unsafe = [
      [sessions.createChatSession, {}, 'session.id'],
      [messages.createChatMessage, { message: { content: 'hello' } }, 'message.id'],
      [messages.batchCreateChatMessages, { messages: [{ id: 'an id' }, {}] }, 'messages[1].id'],
      [attachments.createChatAttachment, { attachment: {} }, 'attachment.id'],
      [tickets.createChatTicket, { target: { $case: 'ticketId', value: 'x' } }, 'chatTicketId'],
      [tickets.createTicket, { ticket: { title: 'a title' } }, 'ticket.id'],
      [sessions.updateChatSession, { session: { id: 'an id', etag: '7' } }, 'session.etag'],
      [messages.updateChatMessage, { message: { id: 'an id', etag: '7' } }, 'message.etag'],
      [tickets.updateTicket, { ticket: { id: 'an id', etag: '7' } }, 'ticket.etag'],
    ]
    for (const [method, request, field] of unsafe) {
      const error = await caught(client.retry(method, request))
      assert.ok(error instanceof TypeError, error)
      assert.ok(error.message.startsWith(`${field}: `), error.message)
    }
    const ticket = { target: { $case: 'ticket', value: { id: 'an id' } } }
    const safe = [
      [tickets.createChatTicket, ticket],
      [tickets.createChatTicket, { chatTicketId: 'x' }],
      [messages.createChatMessage, { message: { id: 'an id' }, expectedRevision: 7 }],
      [messages.updateChatMessage, { message: { id: 'an id' }, metadataMergeJson: '{}', expectedRevision: 7 }],
      [messages.deleteChatMessage, { messageId: 'an id', etag: '7' }],
    ]
    for (const [method, request] of safe) {
      assert.equal((await caught(client.retry(method, request))).code, status.UNIMPLEMENTED)
    }
  })
})
