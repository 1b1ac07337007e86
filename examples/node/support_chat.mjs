// A support chat from its first message to its ticket, by the Node client.
//
// Start the service by `make run`, and then, in another terminal:
//
//   make node-client     (once: it builds the package that this program imports)
//   node examples/node/support_chat.mjs [ADDRESS]
//
// ADDRESS is localhost:50051 by default.
import { randomUUID } from 'node:crypto'

// In your own project, install the package and import it: from 'chat-ticket-client'
import { ChatTicketClient, ChatTicketError } from '../../clients/node/dist/index.js'

async function createSession(client) {
  const id = randomUUID()
  await client.retry(client.sessions.createChatSession, { session: { id } })
  console.log('created a session')
  return id
}

async function say(client, sessionId, role, content, metadataJson = '') {
  // The id is chosen once, before the first attempt. Retries create no second message.
  const message = { id: randomUUID(), role: `CHAT_MESSAGE_ROLE_${role}`, content, metadataJson }
  await client.retry(client.messages.createChatMessage, { sessionId, message })
}

async function history(client, sessionId) {
  async function read(request, options) {
    const messages = []
    for await (const batch of client.messages.listChatMessages(request, options)) messages.push(...batch.messages)
    return messages
  }
  return await client.retry(read, { sessionId })
}

/**
 * Prints what happens until the session is resolved.
 *
 * The stream resumes by itself when the server restarts. To resume after a restart of this program,
 * store `revision` after each handled event, and pass it to `client.watch()` as `afterRevision`.
 */
async function watch(client, sessionId) {
  let end
  for await (const { event, revision } of client.watch(sessionId)) {
    switch (event?.$case) {
      case 'session':
        console.log(`  [watch] ${event.value.status}, has ticket: ${event.value.hasTicket}`)
        // The session may be ahead of the events that lead to it.
        if (event.value.status === 'CHAT_SESSION_STATUS_RESOLVED') end = event.value.revision
        break
      case 'messagesCreated':
        for (const { sequence, content } of event.value.messages) {
          console.log(`  [watch] message ${sequence}: ${content}`)
        }
        break
      case 'messageUpdated':
        console.log(`  [watch] message ${event.value.sequence} has changed`)
        break
      case 'messageDeleted':
        console.log(`  [watch] message ${event.value.messageId} is gone`)
        break
      case 'sessionDeleted':
        console.log('  [watch] the session is gone')
        break
    }
    if (end !== undefined && revision >= end) return
  }
}

async function escalate(client, sessionId) {
  const { chatTicket } = await client.retry(client.tickets.createChatTicket, {
    sessionId,
    chatTicketId: randomUUID(),
    target: { $case: 'ticket', value: { id: randomUUID(), title: 'Where is my order?' } },
  })
  console.log(`opened the ticket '${chatTicket.ticket.title}'`)
  return chatTicket
}

async function showRefusal(call) {
  try {
    await call()
  } catch (error) {
    if (!(error instanceof ChatTicketError)) throw error
    console.log(`refused: ${error.message}`)
    for (const { field, description } of error.violations) console.log(`  ${field}: ${description}`)
  }
}

async function resolve(client, sessionId, ticketId) {
  await client.retry(client.tickets.updateTicket, {
    ticket: { id: ticketId, status: 'TICKET_STATUS_SOLVED' },
    updateMask: ['status'],
  })
  await client.retry(client.sessions.updateChatSession, {
    session: { id: sessionId, status: 'CHAT_SESSION_STATUS_RESOLVED' },
    updateMask: ['status'],
  })
}

// For a remote server add `token` and `credentials: credentials.createSsl()`.
const client = new ChatTicketClient(process.argv[2] ?? 'localhost:50051', { tenant: 'acme' })
try {
  const sessionId = await createSession(client)
  await say(client, sessionId, 'USER', 'Where is my order?', '{"via": "web"}')
  await say(client, sessionId, 'ASSISTANT', 'On its way.')
  for (const { sequence, role, content } of await history(client, sessionId)) {
    console.log(`${sequence} ${role.replace('CHAT_MESSAGE_ROLE_', '')}: ${content}`)
  }

  const watching = watch(client, sessionId)
  await say(client, sessionId, 'USER', 'For a month. Let me talk to you!')
  const { ticketId } = await escalate(client, sessionId)
  await showRefusal(() => say(client, sessionId, 'USER', '', '["not", "an", "object"]'))
  await showRefusal(() => client.retry(client.sessions.deleteChatSession, { sessionId }))
  await resolve(client, sessionId, ticketId)
  await watching
  console.log('resolved')
} finally {
  client.close()
}
