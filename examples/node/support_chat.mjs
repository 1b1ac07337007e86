// A support chat from its first message to its ticket, from Node.
//
// Start the service by `make run`, and then, in another terminal:
//
//   npm ci --prefix examples/node
//   node examples/node/support_chat.mjs [ADDRESS]
//
// ADDRESS is localhost:50051 by default. A program of your own needs the files of protos/.
// `repeat`, `follow` and `explain` are for you to copy.
import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'

import grpc from '@grpc/grpc-js'
import { loadSync } from '@grpc/proto-loader'
import protobuf from 'protobufjs'

const PROTOS = new URL('../../protos/', import.meta.url)
const SERVICE_CONFIG = new URL('chat_ticket/v1/chat_ticket_grpc_service_config.json', PROTOS)
const CALL_MS = 10_000
const SILENCE_MS = 45_000 // three heartbeats, as a server sends them by default

const address = process.argv[2] ?? 'localhost:50051'
const definition = loadSync(
  ['session', 'message', 'ticket'].map((name) => `chat_ticket/v1/chat_${name}.proto`),
  {
    includeDirs: [fileURLToPath(PROTOS)],
    keepCase: true,
    longs: String, // an int64 does not fit a JavaScript number
    enums: String,
    defaults: true,
    oneofs: true, // event.event names the field that is set
  },
)
const { chat_ticket: { v1 } } = grpc.loadPackageDefinition(definition)

const options = {
  'grpc.service_config': readFileSync(SERVICE_CONFIG, 'utf8'), // reads are retried
  // A server that is gone without a word is noticed. It allows a ping every 20 seconds.
  'grpc.keepalive_time_ms': 30_000,
  'grpc.keepalive_timeout_ms': 10_000,
  'grpc.max_reconnect_backoff_ms': 10_000,
}
const credentials = grpc.credentials.createInsecure() // elsewhere: createSsl()
const sessions = new v1.ChatSessionService(address, credentials, options)
const messages = new v1.ChatMessageService(address, credentials, options)
const tickets = new v1.ChatTicketService(address, credentials, options)

function metadata() {
  const metadata = new grpc.Metadata()
  metadata.set('x-tenant-id', 'acme')
  // elsewhere also: metadata.set('authorization', `Bearer ${token}`)
  return metadata
}

// ---- What went wrong ----

const details = protobuf.parse(`
  syntax = "proto3";
  package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message BadRequest {
    message FieldViolation { string field = 1; string description = 2; }
    repeated FieldViolation field_violations = 1;
  }
  message Duration { int32 seconds = 1; int32 nanos = 2; }
  message RetryInfo { Duration retry_delay = 1; }
`, { keepCase: true }).root

/** The reason of a failed call, which fields are wrong, and after how long it may succeed. */
function explain(error) {
  const explained = { reason: '', violations: [], retryMs: undefined }
  const [status] = error.metadata?.get('grpc-status-details-bin') ?? []
  if (status === undefined) return explained // gRPC itself said it, or something on the way
  for (const { type_url, value } of details.lookupType('google.rpc.Status').decode(status).details) {
    const name = type_url.split('/').pop()
    const detail = details.lookup(name)?.decode(value)
    if (name === 'google.rpc.ErrorInfo') explained.reason = detail.reason
    if (name === 'google.rpc.BadRequest') explained.violations = detail.field_violations
    if (name === 'google.rpc.RetryInfo') {
      explained.retryMs = detail.retry_delay.seconds * 1000 + detail.retry_delay.nanos / 1e6
    }
  }
  return explained
}

/** Whether the same call may succeed later. */
function mayPass(error) {
  const { UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED, INTERNAL, UNKNOWN } = grpc.status
  const { reason, retryMs } = explain(error)
  if (retryMs !== undefined) return true
  if ([UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED].includes(error.code)) return true
  // Without a reason they are not the service's: so a proxy ends the stream of a server that is gone.
  return [INTERNAL, UNKNOWN].includes(error.code) && reason === ''
}

/** What the server asks for, and at random up to what the failures ask for. */
function pauseMs(failures, error) {
  const longest = Math.min(200 * 2 ** failures, 10_000)
  return (explain(error).retryMs ?? 0) + Math.random() * longest
}

// ---- Calls ----

/** A call with one response. */
function call(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, metadata(), { deadline: Date.now() + CALL_MS }, (error, response) =>
      error ? reject(error) : resolve(response))
  })
}

/**
 * A call, made until its outcome is known, for up to a minute.
 *
 * For what is safe to repeat: reads, creates whose request has the ids of all that is new, updates
 * without an etag.
 */
const repeat = (client, method, request) => again(() => call(client, method, request))

async function again(attempt) {
  const end = Date.now() + 60_000
  for (let failures = 0; ; failures += 1) {
    try {
      return await attempt()
    } catch (error) {
      const pause = pauseMs(failures, error)
      if (!mayPass(error) || Date.now() + pause > end) throw error
      await sleep(pause)
    }
  }
}

/**
 * What changed in a session after a revision, then every change as it happens.
 *
 * As one stream of WatchChatSession that never breaks: it goes on after the last event by itself.
 * To go on after a restart of the program, keep `revision` of an event that has been handled.
 */
async function* follow(session_id, after_revision = '0') {
  let revision = after_revision
  let shown // the session, as it was told
  let caughtUp = false
  for (let failures = 0; ; failures += 1) {
    const stream = sessions.WatchChatSession({ session_id, after_revision: revision }, metadata())
    stream.on('error', () => {}) // the loop gets it too, unless it has been left
    const silence = setTimeout(() => stream.cancel(), SILENCE_MS)
    let broken = new Error('the stream ended')
    try {
      for await (const event of stream) {
        silence.refresh()
        // Every stream begins with the session, and says once that the history is done.
        let known = false
        let told = event
        if (event.event === 'session') {
          const { status, has_ticket } = event.session
          known = shown?.status === status && shown.has_ticket === has_ticket
          shown = event.session
        } else if (event.event === 'caught_up' && caughtUp) {
          known = event.revision === revision
          told = { event: 'heartbeat', heartbeat: {}, revision: event.revision }
        } else if (event.event === 'caught_up') {
          caughtUp = true
        }
        revision = event.revision
        if (known) continue
        failures = 0
        yield told
        if (event.event === 'session_deleted') return
      }
    } catch (error) {
      if (error.code === grpc.status.NOT_FOUND && shown) {
        yield { event: 'session_deleted', session_deleted: {}, revision }
        return
      }
      if (!mayPass(error)) throw error
      broken = error
    } finally {
      clearTimeout(silence)
      stream.cancel()
    }
    await sleep(pauseMs(failures, broken))
  }
}

// ---- The chat ----

async function say(session_id, role, content, metadata_json = '') {
  // The id is chosen once, outside of the repetition: whatever breaks, it stays one message.
  const message = { id: randomUUID(), role: `CHAT_MESSAGE_ROLE_${role}`, content, metadata_json }
  await repeat(messages, 'CreateChatMessage', { session_id, message })
}

async function history(session_id) {
  const found = []
  const stream = messages.ListChatMessages({ session_id }, metadata())
  for await (const batch of stream) found.push(...batch.messages)
  return found
}

/** Tells what happens until the session is resolved. */
async function watch(session_id) {
  let end
  for await (const event of follow(session_id)) {
    if (event.event === 'session') {
      const { status, has_ticket } = event.session
      console.log(`  [follow] ${status}, has ticket: ${has_ticket}`)
      // It is shown as it is now, which may be ahead of the events before.
      if (status === 'CHAT_SESSION_STATUS_RESOLVED') end = BigInt(event.session.revision)
    } else if (event.event === 'messages_created') {
      for (const message of event.messages_created.messages) {
        console.log(`  [follow] message ${message.sequence}: ${message.content}`)
      }
    } else if (event.event === 'session_deleted') {
      console.log('  [follow] the session is gone')
    }
    if (end !== undefined && BigInt(event.revision) >= end) return
  }
}

/** Shows why a call is refused. */
async function refused(attempt) {
  try {
    await attempt()
  } catch (error) {
    const { reason, violations } = explain(error)
    console.log(`refused: ${reason}: ${error.details}`)
    for (const { field, description } of violations) console.log(`  ${field}: ${description}`)
  }
}

const session_id = randomUUID()
await repeat(sessions, 'CreateChatSession', { session: { id: session_id } })
console.log('created a session')

await say(session_id, 'USER', 'Where is my order?', '{"via": "web"}')
await say(session_id, 'ASSISTANT', 'On its way.')
for (const { sequence, role, content } of await again(() => history(session_id))) {
  console.log(`${sequence} ${role.replace('CHAT_MESSAGE_ROLE_', '')}: ${content}`)
}

const watching = watch(session_id)
await say(session_id, 'USER', 'Since a month. Let me talk to you!')

const { chat_ticket } = await repeat(tickets, 'CreateChatTicket', {
  session_id,
  chat_ticket_id: randomUUID(),
  ticket: { id: randomUUID(), title: 'Where is my order?' },
})
console.log(`opened the ticket '${chat_ticket.ticket.title}'`)

await refused(() => say(session_id, 'USER', '', '["not an object"]'))
await refused(() => repeat(sessions, 'DeleteChatSession', { session_id }))

await repeat(tickets, 'UpdateTicket', {
  ticket: { id: chat_ticket.ticket_id, status: 'TICKET_STATUS_SOLVED' },
  update_mask: { paths: ['status'] },
})
await repeat(sessions, 'UpdateChatSession', {
  session: { id: session_id, status: 'CHAT_SESSION_STATUS_RESOLVED' },
  update_mask: { paths: ['status'] },
})
await watching
console.log('resolved')
for (const client of [sessions, messages, tickets]) client.close()
