// Against the service at CHAT_TICKET_ADDRESS; tests/client/test_node_client.py starts it.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, test } from 'node:test'

import { ChatTicketClient, status } from 'chat-ticket-client'

const client = new ChatTicketClient(process.env.CHAT_TICKET_ADDRESS, { tenant: `node ${randomUUID()}` })
after(() => client.close())

const text = 'naïve 中文 👩‍👩‍👧‍👦 "quoted"\n\ttab'

async function aSession() {
  const id = randomUUID()
  await client.sessions.createChatSession({ session: { id } })
  return id
}

const say = (sessionId, content = 'hello', id = randomUUID()) =>
  client.retry(client.messages.createChatMessage, {
    sessionId,
    message: { id, role: 'CHAT_MESSAGE_ROLE_USER', content },
  })

async function listed(sessionId) {
  const found = []
  for await (const { messages } of client.messages.listChatMessages({ sessionId })) found.push(...messages)
  return found
}

test('what is created is read as it was sent', async () => {
  const sessionId = await aSession()
  const id = randomUUID()
  const before = Date.now()
  const { message } = await client.messages.createChatMessage({
    sessionId,
    message: {
      id,
      role: 'CHAT_MESSAGE_ROLE_ASSISTANT',
      content: text,
      metadataJson: '{"n": 9007199254740993}',
      attachments: [{ fileUrl: 'https://files.example/a.png', fileName: 'a.png', fileType: 'image/png' }],
    },
  })
  assert.equal(message.content, text)
  assert.equal(message.role, 'CHAT_MESSAGE_ROLE_ASSISTANT')
  assert.equal(message.sequence, 1n)
  assert.match(message.metadataJson, /9007199254740993/)
  assert.ok(Math.abs(message.createTime.getTime() - before) < 60_000)
  const got = await client.messages.getChatMessage({ messageId: id })
  assert.deepEqual(got.message, message)
  const { attachments } = await client.attachments.listChatAttachments({
    parent: { $case: 'messageId', value: id },
  })
  assert.deepEqual(attachments, message.attachments)
  const { sessions } = await client.sessions.listChatSessions({ hasTicket: false, startCreateTime: new Date(0) })
  assert.ok(sessions.some((session) => session.id === sessionId))
  const { sessions: none } = await client.sessions.listChatSessions({ hasTicket: true })
  assert.deepEqual(none, [])
})

test('a create that is repeated with its ids creates nothing twice', async () => {
  const sessionId = await aSession()
  const id = randomUUID()
  const [one, two] = [await say(sessionId, 'once', id), await say(sessionId, 'once', id)]
  assert.deepEqual(one, two)
  assert.deepEqual(await listed(sessionId), [one.message])
})

test('a long list comes in batches, in its order', async () => {
  const sessionId = await aSession()
  const messages = Array.from({ length: 500 }, (_, i) => ({ role: 'CHAT_MESSAGE_ROLE_USER', content: `${i}` }))
  await client.messages.batchCreateChatMessages({ sessionId, messages })
  const found = await listed(sessionId)
  assert.deepEqual(found.map(({ content }) => content), messages.map(({ content }) => content))
  assert.deepEqual(found.map(({ sequence }) => sequence), messages.map((_, i) => BigInt(i + 1)))
})

test('a watch shows the history, and then what happens', async () => {
  const sessionId = await aSession()
  await say(sessionId, 'before')
  const found = []
  for await (const { event, revision } of client.watch(sessionId)) {
    found.push([event.$case, revision, event.value.messages?.map(({ content }) => content)])
    if (event.$case === 'caughtUp') await say(sessionId, 'live')
    // Not before the message is seen: a watch shows the newest state of the session first.
    if (event.$case === 'messagesCreated' && event.value.messages[0].content === 'live') {
      await client.tickets.createChatTicket({
        sessionId,
        target: { $case: 'ticket', value: { title: 'help' } },
      })
    }
    if (event.$case === 'ticket') break
  }
  assert.deepEqual(found, [
    ['session', 0n, undefined],
    ['messagesCreated', 1n, ['before']],
    ['caughtUp', 1n, undefined],
    ['messagesCreated', 2n, ['live']],
    ['session', 2n, undefined],
    ['ticket', 3n, undefined],
  ])
})

test('an error has its reason and details', async () => {
  await assert.rejects(client.sessions.createChatSession({ session: { id: 'x', status: 'NO_STATUS' } }), (error) => {
    assert.equal(error.code, status.INVALID_ARGUMENT)
    assert.equal(error.reason, 'INVALID_ARGUMENT')
    assert.deepEqual(error.violations.map(({ field }) => field).sort(), ['session.id', 'session.status'])
    assert.equal(error.retrySeconds, undefined)
    return true
  })
  const absent = randomUUID()
  await assert.rejects(client.sessions.getChatSession({ sessionId: absent }), (error) => {
    assert.equal(error.code, status.NOT_FOUND)
    assert.equal(error.reason, 'CHAT_SESSION_NOT_FOUND')
    const resource = error.details.find(({ type }) => type === 'google.rpc.ResourceInfo')
    assert.equal(resource.value.resourceName, absent)
    return true
  })
  await assert.rejects(client.watch(absent).next(), { reason: 'CHAT_SESSION_NOT_FOUND' })
  await assert.rejects(client.watch(await aSession(), { afterRevision: 77 }).next(), {
    reason: 'REVISION_OUT_OF_RANGE',
  })
  await assert.rejects(say(randomUUID()), { reason: 'CHAT_SESSION_NOT_FOUND' })
  const nobody = new ChatTicketClient(process.env.CHAT_TICKET_ADDRESS)
  await assert.rejects(nobody.sessions.getChatSession({ sessionId: absent }), { reason: 'TENANT_REQUIRED' })
  nobody.close()
})

test('a draft is watched while it is written', async () => {
  const sessionId = await aSession()
  const id = randomUUID()
  const append = (offset, text) => ({ request: { $case: 'append', value: { offset: BigInt(offset), text } } })
  const seen = []
  let show
  async function* requests() {
    const value = { sessionId, draft: { id, role: 'CHAT_MESSAGE_ROLE_ASSISTANT' } }
    yield { request: { $case: 'start', value } }
    yield append(0, 'ö')
    await new Promise((resolve) => (show = resolve))
    yield append(2, '!')
    yield { request: { $case: 'finish', value: {} } }
  }
  const written = (async () => {
    const kinds = []
    for await (const { response } of client.drafts.writeChatDraft(requests())) kinds.push(response.$case)
    return kinds
  })()
  let content = ''
  for await (const { event } of client.watch(sessionId, { includeDrafts: true })) {
    if (event.$case === 'draft') content = event.value.content
    if (event.$case === 'draftAppended') content += event.value.text
    if (content === 'ö' && show) show()
    seen.push(event.$case)
    if (event.$case === 'messagesCreated') {
      assert.deepEqual([event.value.messages[0].id, event.value.messages[0].content], [id, 'ö!'])
      break
    }
  }
  assert.deepEqual(seen.slice(-2), ['draftEnded', 'messagesCreated'])
  const kinds = await written
  assert.deepEqual([kinds[0], kinds.at(-1)], ['started', 'finished'])
  await assert.rejects(client.drafts.getChatDraft({ draftId: id }), { code: status.NOT_FOUND })
})
