// The rules of watch(), stream by stream.
import assert from 'node:assert/strict'
import { mock, suite, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'

import { ChatDraft, ChatMessage, ChatTicket, status } from 'chat-ticket-client'

import { BORN, brief, cancelled, collect, deleted, event, refusal, scripted, serve, session } from './fake.mjs'

const random = mock.method(Math, 'random', () => 0)

const ticket = (revision, state) =>
  event('ticket', revision, ChatTicket.fromPartial({ id: 'a link', ticket: { id: 'a ticket', status: state } }))
const unlinked = (revision) => event('ticket', revision, ChatTicket.fromPartial({}))

const unavailable = refusal(status.UNAVAILABLE, 'DRAINING')
const expired = refusal(status.UNAUTHENTICATED, 'CREDENTIAL_EXPIRED')

suite('watch', () => {
  test('resumes after the last event, whatever ends the stream', async (t) => {
    const script = scripted(
      [session(0), deleted(1), event('caughtUp', 1), deleted(2), unavailable],
      [session(2), event('caughtUp', 2), deleted(3), 'end'],
      [session(3), event('caughtUp', 3), refusal(status.INTERNAL, '')],
      [session(3), deleted(4), refusal(status.RESOURCE_EXHAUSTED, 'SLOW_READER', { retrySeconds: 0 })],
      [session(4), deleted(5), event('caughtUp', 5), event('sessionDeleted', 6)],
    )
    const client = await serve(t, script)
    const interruptions = []
    const found = await collect(client.watch('an id', { onInterruption: (each) => interruptions.push(each) }))
    assert.deepEqual(found, [
      'session 0',
      'messageDeleted 1',
      'caughtUp 1',
      'messageDeleted 2',
      'messageDeleted 3',
      'messageDeleted 4',
      'messageDeleted 5',
      'sessionDeleted 6',
    ])
    assert.deepEqual(script.requests.map(({ afterRevision }) => afterRevision), [0n, 2n, 3n, 3n, 4n])
    assert.deepEqual(
      interruptions.map(({ revision, failures, message }) => [revision, failures, message]),
      [
        [2n, 0, 'DRAINING: no'],
        [3n, 0, 'the stream ended'],
        [3n, 1, 'INTERNAL: no'],
        [4n, 0, 'SLOW_READER: no'],
      ],
    )
  })

  test('starts after the given revision', async (t) => {
    const large = 2n ** 60n + 1n
    const script = scripted([session(0), 'hold'])
    const client = await serve(t, script)
    await collect(client.watch('an id', { afterRevision: large }), 1)
    assert.equal(script.requests[0].afterRevision, large)
  })

  test('sends the epoch of its position, and throws when the history has changed', async (t) => {
    const script = scripted(
      [session(0), { ...event('caughtUp', 2), epoch: 'of 2' }, unavailable],
      [refusal(status.OUT_OF_RANGE, 'HISTORY_CHANGED', { info: { revision: '1', epoch: 'of 1' } })],
    )
    const client = await serve(t, script)
    await assert.rejects(collect(client.watch('an id', { epoch: 'stored' })), (error) => {
      assert.deepEqual(error.metadata, { revision: '1', epoch: 'of 1' })
      return error.reason === 'HISTORY_CHANGED'
    })
    assert.deepEqual(script.requests.map(({ epoch }) => epoch), ['stored', 'of 2'])
  })

  test('delivers the session again only when its status or ticket has changed', async (t) => {
    const resolved = { status: 'CHAT_SESSION_STATUS_RESOLVED' }
    const script = scripted(
      [session(0), unavailable],
      [session(1, { etag: 'another', updateTime: new Date() }), unavailable],
      [session(2, resolved), unavailable],
      [session(2, { ...resolved, hasTicket: true }), unavailable],
      [session(2, { ...resolved, hasTicket: true }), event('sessionDeleted', 2)],
    )
    const client = await serve(t, script)
    assert.deepEqual(await collect(client.watch('an id')), ['session 0', 'session 2', 'session 2', 'sessionDeleted 2'])
    assert.deepEqual(script.requests.map(({ afterRevision }) => afterRevision), [0n, 0n, 1n, 2n, 2n])
  })

  test('delivers the session when its title or labels have changed', async (t) => {
    const titled = { title: 'a title' }
    const script = scripted([
      session(0),
      session(1, titled),
      session(2, { ...titled, labels: { channel: 'web' } }),
      session(3, { ...titled, labels: { channel: 'web' } }),
      event('sessionDeleted', 3),
    ])
    const client = await serve(t, script)
    assert.deepEqual(await collect(client.watch('an id')), ['session 0', 'session 1', 'session 2', 'sessionDeleted 3'])
  })

  test('delivers the ticket when it has changed, and when it is gone, also over a break', async (t) => {
    const linked = (revision) => session(revision, { hasTicket: true })
    const script = scripted(
      [linked(1), ticket(1, 'TICKET_STATUS_OPEN'), unavailable],
      [linked(1), ticket(1, 'TICKET_STATUS_OPEN'), ticket(2, 'TICKET_STATUS_SOLVED'), unavailable],
      [session(2), event('caughtUp', 3), unavailable],
      [session(3), linked(3), ticket(4, 'TICKET_STATUS_OPEN'), session(4), unlinked(5), event('sessionDeleted', 6)],
    )
    const client = await serve(t, script)
    assert.deepEqual(await collect(client.watch('an id')), [
      'session 1',
      'ticket 1',
      'ticket 2',
      'session 2',
      'ticket 2',
      'caughtUp 3',
      'session 3',
      'ticket 4',
      'session 4',
      'ticket 5',
      'sessionDeleted 6',
    ])
  })

  test('delivers caughtUp once, and later a heartbeat when the position has moved', async (t) => {
    const script = scripted(
      [session(0), event('caughtUp', 0), unavailable],
      [session(0), event('caughtUp', 0), unavailable],
      [session(0), event('caughtUp', 2), event('sessionDeleted', 2)],
    )
    const client = await serve(t, script)
    assert.deepEqual(await collect(client.watch('an id')), [
      'session 0',
      'caughtUp 0',
      'heartbeat 2',
      'sessionDeleted 2',
    ])
  })

  test('reports a session that was deleted or replaced during an interruption', async (t) => {
    const gone = refusal(status.NOT_FOUND, 'CHAT_SESSION_NOT_FOUND')
    for (const second of [gone, session(0, { createTime: new Date() })]) {
      const client = await serve(t, scripted([session(0), deleted(3), unavailable], [second, 'hold']))
      assert.deepEqual(await collect(client.watch('an id')), ['session 0', 'messageDeleted 3', 'sessionDeleted 3'])
    }
    const never = await serve(t, scripted([gone]))
    await assert.rejects(never.watch('an id').next(), { reason: 'CHAT_SESSION_NOT_FOUND' })
  })

  test('throws errors that a retry cannot resolve', async (t) => {
    for (const [code, reason] of [
      [status.OUT_OF_RANGE, 'REVISION_OUT_OF_RANGE'],
      [status.PERMISSION_DENIED, 'PERMISSION_DENIED'],
      [status.INTERNAL, 'INTERNAL'],
      [status.UNAUTHENTICATED, 'CREDENTIAL_EXPIRED'], // there is no function to ask for another
    ]) {
      const script = scripted([session(0), refusal(code, reason)])
      const client = await serve(t, script, { token: 'fixed' })
      await assert.rejects(collect(client.watch('an id')), { name: 'ChatTicketError', code, reason })
      assert.equal(script.requests.length, 1)
    }
  })

  test('asks for another token up to three times in a row when tokens expire', async (t) => {
    let asked = 0
    const token = () => `token ${++asked}`
    const script = scripted(
      [session(0), expired],
      [expired],
      [expired],
      [session(0), deleted(1), expired],
      [expired],
      [expired],
      [expired],
    )
    const client = await serve(t, script, { token })
    const found = []
    await assert.rejects(async () => {
      for await (const each of client.watch('an id')) found.push(brief(each))
    }, { reason: 'CREDENTIAL_EXPIRED' })
    assert.deepEqual(found, ['session 0', 'messageDeleted 1'])
    assert.equal(asked, 7)
  })

  test('asks for another token after a long outage', async (t) => {
    const outage = Array(5).fill([unavailable])
    const script = scripted([session(0), deleted(1), unavailable], ...outage, [expired], [session(1), event('sessionDeleted', 2)])
    const client = await serve(t, script, { token: () => 'a token', options: { 'grpc.enable_retries': 0 } })
    const found = await collect(client.watch('an id'))
    assert.deepEqual(found, ['session 0', 'messageDeleted 1', 'sessionDeleted 2'])
  })

  test('asks for another token when a stream lasts as long as a token', async (t) => {
    const streams = Array(5).fill([session(1), event('caughtUp', 1), expired])
    const script = scripted([session(0), deleted(1), unavailable], ...streams, [event('sessionDeleted', 2)])
    const client = await serve(t, script, { token: () => 'a token' })
    const found = await collect(client.watch('an id'))
    assert.deepEqual(found, ['session 0', 'messageDeleted 1', 'caughtUp 1', 'sessionDeleted 2'])
  })

  test('resumes after silence, and does not count the time of its caller', async (t) => {
    const script = scripted([session(0), deleted(1), 'hold'], [session(1), event('sessionDeleted', 2)])
    const client = await serve(t, script)
    const interruptions = []
    const found = []
    // Longer than a busy machine stops this process, client and server alike.
    const options = { silenceMs: 500, onInterruption: (each) => interruptions.push(each) }
    for await (const each of client.watch('an id', options)) {
      found.push(brief(each))
      if (found.length === 1) await sleep(600)
      assert.equal(interruptions.length, found.length > 2 ? 1 : 0)
    }
    assert.deepEqual(found, ['session 0', 'messageDeleted 1', 'sessionDeleted 2'])
    assert.equal(interruptions[0].message, 'the server sent nothing for 500 ms')
    assert.equal(interruptions[0].error, undefined)
    await cancelled(script.streams[0])
  })

  test('waits longer after each failure, and adds the delay that the server asks for', async (t) => {
    random.mock.mockImplementation(() => 1)
    t.after(() => random.mock.mockImplementation(() => 0))
    const asking = refusal(status.UNAVAILABLE, 'DRAINING', { retrySeconds: 0.1 })
    const client = await serve(t, scripted([asking], ['end'], ['end'], [session(0), event('sessionDeleted', 0)]), {
      options: { 'grpc.enable_retries': 0 },
    })
    const pauses = []
    await collect(client.watch('an id', { onInterruption: ({ pauseMs }) => pauses.push(pauseMs) }))
    assert.deepEqual(pauses, [300, 400, 800])
  })

  test('ends at the server when it is left, returned or aborted', async (t) => {
    const script = scripted([session(0), 'hold'], [session(0), 'hold'], [session(0), 'hold'], [unavailable])
    const client = await serve(t, script)
    for await (const _ of client.watch('an id')) break
    await cancelled(script.streams[0])

    const held = client.watch('an id')
    await held.next()
    const waiting = held.next()
    await held.return()
    assert.deepEqual(await waiting, { done: true, value: undefined })
    assert.deepEqual(await held.next(), { done: true, value: undefined })
    await cancelled(script.streams[1])

    const abort = new AbortController()
    const reason = new Error('no longer wanted')
    const aborted = client.watch('an id', { signal: abort.signal })
    await aborted.next()
    setTimeout(() => abort.abort(reason), 20)
    await assert.rejects(aborted.next(), reason)
    await cancelled(script.streams[2])
  })

  test('can be ended while it waits to resume', async (t) => {
    const asking = refusal(status.UNAVAILABLE, 'DRAINING', { retrySeconds: 60 })
    const client = await serve(t, scripted([asking], [asking], [asking]), { options: { 'grpc.enable_retries': 0 } })
    const resuming = () => {
      let onInterruption
      const interrupted = new Promise((resolve) => (onInterruption = resolve))
      return [interrupted, { onInterruption }]
    }
    const [first, options] = resuming()
    const held = client.watch('an id', options)
    const waiting = held.next()
    await first
    await held.return()
    assert.deepEqual(await waiting, { done: true, value: undefined })

    const [second, more] = resuming()
    const abort = new AbortController()
    const aborted = client.watch('an id', { ...more, signal: abort.signal }).next()
    await second
    abort.abort()
    await assert.rejects(aborted, { name: 'AbortError' })

    const [third, others] = resuming()
    const closed = client.watch('an id', others).next()
    await third
    client.close()
    await assert.rejects(closed, /client is closed/)
  })

  test('rejects with what is thrown into it, waiting or not', async (t) => {
    const client = await serve(t, scripted([session(0), 'hold'], [session(0), 'hold']))
    for (const isWaiting of [true, false]) {
      const watch = client.watch('an id')
      await watch.next()
      const waiting = isWaiting ? watch.next() : undefined
      await assert.rejects(watch.throw(new Error('mine')), /mine/)
      assert.equal((await waiting)?.done, isWaiting ? true : undefined)
    }
  })

  test('leaves room for calls, however many there are', async (t) => {
    const handlers = {
      watchChatSession: (call) => call.write(session(0)),
      getChatSession: (_, callback) => callback(null, {}),
    }
    const client = await serve(t, handlers, {}, { 'grpc.max_concurrent_streams': 100 })
    const watches = Array.from({ length: 250 }, () => client.watch('an id'))
    for (const { value } of await Promise.all(watches.map((watch) => watch.next()))) {
      assert.equal(value.event.$case, 'session')
    }
    await client.sessions.getChatSession({ sessionId: 'an id' })
    await Promise.all(watches.map((watch) => watch.return()))
  })
})

suite('watch with drafts', () => {
  const draft = (id, content, revision = 0) =>
    event('draft', revision, ChatDraft.create({ id, content, length: BigInt(Buffer.byteLength(content)) }))
  const appended = (draftId, offset, text) => event('draftAppended', 0, { draftId, offset: BigInt(offset), text })
  const ended = (draftId) => event('draftEnded', 1, { draftId })
  const created = (id, revision) => event('messagesCreated', revision, { messages: [ChatMessage.create({ id })] })
  const short = ({ revision, event: { $case, value } }) =>
    `${$case} ${revision} ${value.id ?? value.draftId ?? value.messages?.[0].id ?? ''} ${value.text ?? value.content ?? ''}`.trim()

  async function collectAll(watch) {
    const found = []
    for await (const each of watch) found.push(short(each))
    return found.filter((each) => !/^(session|caughtUp|heartbeat) /.test(each))
  }

  test('asks for them, and goes on where the caller was', async (t) => {
    const drafts = [draft('a', 'ö'), draft('b', 'b'), draft('c', ''), draft('d', 'd')]
    const later = [created('d', 1), draft('a', 'ö?!', 1), draft('b', 'b', 1), draft('e', 'e', 1)]
    const script = scripted(
      [session(0), ...drafts, event('caughtUp', 0), appended('a', 2, '?'), unavailable],
      [session(0), ...later, event('caughtUp', 1), ended('b'), ended('unknown'), event('sessionDeleted', 2)],
    )
    const client = await serve(t, script)
    assert.deepEqual(await collectAll(client.watch('an id', { includeDrafts: true })), [
      'draft 0 a ö',
      'draft 0 b b',
      'draft 0 c',
      'draft 0 d d',
      'draftAppended 0 a ?',
      'draftEnded 0 d',
      'messagesCreated 1 d',
      'draftAppended 1 a !',
      'draft 1 e e',
      'draftEnded 1 c',
      'draftEnded 1 b',
      'draftEnded 1 a',
      'draftEnded 1 e',
      'sessionDeleted 2',
    ])
    assert.deepEqual(script.requests.map(({ includeDrafts }) => includeDrafts), [true, true])
  })
})

suite('messagesOf', () => {
  const message = (sequence) => ChatMessage.create({ id: `m${sequence}`, sequence: BigInt(sequence) })
  const first = session(9).event.value

  test('resumes after the last message, and ends where the first stream would have', async (t) => {
    const scripts = [
      [{ session: first, messages: [message(1), message(2)] }, unavailable],
      [refusal(status.UNAVAILABLE, '')],
      [{ session: { ...first, revision: 12n }, messages: [message(5)] }, { session: undefined, messages: [message(9)] }, 'end'],
    ]
    const { watchChatSession, requests } = scripted(...scripts)
    const client = await serve(t, { listChatMessages: watchChatSession }, { options: { 'grpc.enable_retries': 0 } })
    const found = []
    for await (const { sequence } of client.messagesOf('an id')) found.push(sequence)
    assert.deepEqual(found, [1n, 2n, 5n, 9n])
    const bounds = requests.map(({ afterSequence, beforeSequence }) => [afterSequence, beforeSequence])
    assert.deepEqual(bounds, [[0n, 0n], [2n, 10n], [2n, 10n]])
  })

  test('throws when the session is gone, and in time when nothing answers', async (t) => {
    const absent = refusal(status.NOT_FOUND, 'CHAT_SESSION_NOT_FOUND')
    const later = new Date(BORN.getTime() + 1)
    for (const end of [[absent], [{ session: { ...first, createTime: later }, messages: [] }, 'hold']]) {
      const { watchChatSession } = scripted([{ session: first, messages: [message(1)] }, unavailable], end)
      const client = await serve(t, { listChatMessages: watchChatSession })
      const messages = client.messagesOf('an id')
      assert.equal((await messages.next()).value.sequence, 1n)
      await assert.rejects(messages.next(), { code: status.NOT_FOUND })
    }
    const silent = await serve(t, { listChatMessages: () => {} })
    await assert.rejects(silent.messagesOf('an id', { timeoutMs: 200 }).next(), { code: status.DEADLINE_EXCEEDED })
  })
})
